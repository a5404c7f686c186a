"""Results for readers: tables, plots, comparisons, and the pages made of them."""
