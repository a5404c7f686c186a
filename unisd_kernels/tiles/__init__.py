"""What happens to a tile of logits. One driver (`driver.py`) makes the tiles; a filling says what is done to them."""
