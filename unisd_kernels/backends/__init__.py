"""Operations on tiles of logits (`base.py`), and the engine that walks chunks of rows with them (`engine.py`)."""
