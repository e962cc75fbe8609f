"""The experiment behind "less computation, more stable training": small LLaMAs that differ in their norms alone.

Nothing here is imported by ``import rmsnorm``; ``rmsnorm study`` (command.py) is the way in.
"""
