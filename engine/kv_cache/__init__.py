"""Keys and values: the page pool, the prefix cache, and where each request has its pages."""
