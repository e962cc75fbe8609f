"""The only file that makes ``python -m rmsnorm`` the command ``rmsnorm``."""

from .cli import main

main()
