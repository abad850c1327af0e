"""Everything that knows another library."""
