"""The views of a row for people: in a terminal, and as a page."""
