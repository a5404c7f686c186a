"""A fixed set of everyday chat prompts with short reference answers, held out from all training.

Used teacher-forced: how probable the answers are to a model (retention), and how far its distribution on them has
moved from the base model's (drift). The answers need not be the best ones; they only have to stay the same, so do not
edit the list: figures would no longer be comparable.
"""

from __future__ import annotations

from typing import Any

_PAIRS = (
    (
        "What is the capital of Italy?",
        "The capital of Italy is Rome.",
    ),
    (
        "Why is the sky blue?",
        "Air scatters short wavelengths more than long ones, so blue light reaches us from every direction.",
    ),
    (
        "Write one sentence that describes a quiet morning.",
        "Mist lay over the fields, and only a single bird was singing.",
    ),
    (
        "Give me three synonyms for happy.",
        "Cheerful, joyful, and glad.",
    ),
    (
        "How do I boil an egg?",
        "Put the egg into boiling water, wait eight minutes for a firm yolk, then cool it in cold water.",
    ),
    (
        "Translate to French: Good evening, my friend.",
        "Bonsoir, mon ami.",
    ),
    (
        "Correct the grammar: She go to school every days.",
        "She goes to school every day.",
    ),
    (
        "What does a thermometer measure?",
        "A thermometer measures temperature.",
    ),
    (
        "Suggest a name for a small bakery.",
        "You could call it The Morning Crumb.",
    ),
    (
        "Explain what a noun is to a child.",
        "A noun is a word that names a person, a place, an animal, or a thing.",
    ),
    (
        "Write a short thank-you note to a neighbor who watered my plants.",
        "Dear neighbor, thank you for watering my plants while I was away. They look wonderful, and I really "
        "appreciate your help.",
    ),
    (
        "Which planet is closest to the sun?",
        "Mercury is the planet closest to the sun.",
    ),
    (
        "How can I fall asleep more easily?",
        "Go to bed at the same time each night, keep the room dark and cool, and put your phone away an hour before.",
    ),
    (
        "Summarize in one sentence: The library will be closed on Monday because the roof has to be repaired. "
        "It will open again on Tuesday at nine.",
        "The library is closed on Monday for roof repairs and reopens on Tuesday at nine.",
    ),
    (
        "Who wrote Romeo and Juliet?",
        "Romeo and Juliet was written by William Shakespeare.",
    ),
    (
        "Write a Python function that returns the larger of two numbers.",
        "def larger(x, y):\n    return x if x > y else y",
    ),
    (
        "Is a tomato a fruit or a vegetable?",
        "Botanically a tomato is a fruit, but in the kitchen it is treated as a vegetable.",
    ),
    (
        "Tell me a short joke about a cat.",
        "Why did the cat sit on the computer? It wanted to keep an eye on the mouse.",
    ),
    (
        "What should I pack for a day at the beach?",
        "Pack sunscreen, a towel, water, a hat, swimwear, and a book.",
    ),
    (
        "Turn this into a question: They are coming tomorrow.",
        "Are they coming tomorrow?",
    ),
    (
        "Is this review positive or negative? The soup was cold and the waiter was rude.",
        "The review is negative.",
    ),
    (
        "What is photosynthesis?",
        "Photosynthesis is how plants use sunlight, water, and carbon dioxide to make sugar and oxygen.",
    ),
    (
        "Give one reason to learn a musical instrument.",
        "Learning an instrument trains your memory and teaches patience.",
    ),
    (
        "I feel nervous about my first day at work. What can I tell myself?",
        "Everyone was new once, and nobody expects you to know everything today.",
    ),
)


CHAT_PROBE: tuple[dict[str, Any], ...] = tuple(
    {"prompt": [{"role": "user", "content": question}], "completion": answer} for question, answer in _PAIRS
)
"""24 items `{"prompt": messages, "completion": str}`."""
