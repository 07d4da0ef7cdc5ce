"""Loops: training an adapter, and what a run needs to be reported, stopped and continued."""
