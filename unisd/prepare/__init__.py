"""From rows of questions and answers to rows with every view: `unisd prepare`.

sources.py      rows from files, folders and the hub
questions.py    which questions are the same
neighbours.py   which other rows each row is shown: random, retrieval, fixed sets
embeddings.py   sentence embeddings, and exact nearest neighbours in blocks
replies.py      replies of a model, kept: a killed run goes on where it was
asking.py       asking a model until its reply is accepted
induction.py    general instructions from solved examples
negatives.py    wrong demonstrations by the model itself
settings.py     what can be chosen
pipeline.py     all of it in order
report.py       what became of the rows
folder.py       the prepared rows on disk
"""
