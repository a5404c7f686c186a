"""Views scored with int8 products: each score in an interval, and what is not sure enough scored again."""
