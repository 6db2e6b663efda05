"""What processes talk over, and how they notice each other's end: typed ZMQ endpoints, CURVE, lifelines, heartbeats."""
