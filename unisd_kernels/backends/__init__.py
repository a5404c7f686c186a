"""What happens to a tile of logits. One driver (`driver.py`) makes the tiles; a backend says what is done to them."""
