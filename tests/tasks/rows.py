"""Tiny rows in every format that is read."""

OPEN = [
    {"question": "What is the capital of the fictional land Norra?", "answer": "Velm is its capital."},
    {"question": "Which metal do Norrans mine?", "answer": "They mine blue tin."},
]
CHOICE = {"question": "Where does a kite fly?", "choices": ["in a cellar", "in the wind", "under water"]}
SCIENCE = {
    **CHOICE,
    "answer": 1,
    "hint": "Kites are light.",
    "lecture": "Wind lifts.",
    "solution": "Wind lifts the kite.",
}
COS_E = {**CHOICE, "answer": "in the wind", "abstractive_explanation": "moving air carries it"}
GPQA = {
    "Question": "Which particle is lightest?",
    "Correct Answer": "quorn",
    "Incorrect Answer 1": "blip",
    "Incorrect Answer 2": "zark",
    "Incorrect Answer 3": "mond",
    "Explanation": "Its mass is smallest.",
}
MBPP = {
    "text": "Write a function to add one to a number.",
    "code": "import math\r\ndef plus(n):\r\n    return n + 1",
    "test_setup_code": "",
    "test_list": ["assert add_one(1) == 2", "assert add_one(-1) == 0"],
}
SANITIZED = {
    "prompt": "Write a function to round down.",
    "code": "def down(x):\n    return math.floor(x)",
    "test_imports": ["import math"],
    "test_list": ["assert down(1.5) == 1"],
}
HUMANEVAL = {
    "task_id": "X/0",
    "prompt": 'from typing import List\n\ndef total(xs: List[int]) -> int:\n    """Sum of xs."""\n',
    "canonical_solution": "    return sum(xs)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
    "entry_point": "total",
}
TOOLS = {
    "Name": "Lamps",
    "Function_Description": {
        "findLamp": 'Find a lamp.\nParameters: {"room": "string"}',
        "switchLamp": 'Switch it.\nParameters: {"lampId": "string", "on": "boolean"}',
        "components": "",
    },
    "Instructions": ["Find the lamp in the hall.", "Switch on the lamp in the hall.", "Ask me."],
    "Golden_Answers": [
        [{"Action": "findLamp", "Action_Input": '{"room": "hall", "floor": ""}'}],
        [
            {"Action": "findLamp", "Action_Input": '{"room": "hall"}'},
            {"Action": "switchLamp", "Action_Input": '{"lampId": ${lampId from findLamp}, "on": true}'},
            {"Action": "[Optional]findLamp", "Action_Input": "{}"},
        ],
        [{"Action": "getDetails", "Action_Input": '{"Question": "Which?"}'}],
    ],
}
