"""Statistics of a model that some policies need, collected once over a text."""
