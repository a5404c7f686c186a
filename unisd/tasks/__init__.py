"""Kinds of task: what a row of each kind is, how its views are written, what a wrong answer to it must satisfy.

base.py              `Example`, `Task`, `Rejected`: the interface
"""
