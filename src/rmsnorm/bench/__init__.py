"""Builds what `rmsnorm bench` shows: races against the clock, the memory they need, tables, figures, reports.

cases → contenders → race → timing               what is measured, who takes part, the check, the clock
            ↑ peers, operators                   how other libraries are called
              ↓ worker (a process per thread count)
           results → console, export → figures, html        what is kept, and how it is shown
command.py registers the commands; bars.py is the performance contract, memory.py the bytes, published.py the docs.
"""
