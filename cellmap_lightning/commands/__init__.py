"""Commands: one ``<name>_command.py`` per command, the jobs behind them, and the checks that they share."""
