"""The page at `/`: what the server is doing now. A feed of one event a second, and the files of the page."""
