"""The training loop; it knows a Backend, never a device library."""
