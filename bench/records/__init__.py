"""Results as they are kept: rows, the machine beside them, why a row has no figures, what is wrong or slow."""
