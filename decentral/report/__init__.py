"""Tables and pictures made from journals and outcomes."""
