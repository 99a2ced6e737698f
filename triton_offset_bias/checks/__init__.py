"""Checks of what users give, in four rooms.

`call` checks a whole call and fills in its defaults; `tensors` checks shapes, dtypes and devices; `data` checks what
only the numbers in tensors tell; `arguments` checks single values. A `check_*` returns nothing, a `checked_*` the
value.
"""
