"""One optimizer step, in pure Python: its phases, what backward passes add, what becomes of the update.

The adapters do to tensors what is decided here; every transition is tested without a framework.
"""
