"""Control operations (pause, flush, weight updates, memory): declared once, and the methods that are made of them."""
