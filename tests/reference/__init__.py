"""The policies and a Llama as slow float64 loops: what the library is tested against."""
