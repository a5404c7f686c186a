"""The two processes of a sandbox: one with the tests, one with the code."""
