"""Checks of users' arguments, in four modules.

`call` checks a whole call and fills in its defaults; `tensors` checks shapes, dtypes and devices; `data` checks the
numbers in tensors; `arguments` checks single values. A `check_*` returns nothing; a `checked_*` returns the value.
"""
