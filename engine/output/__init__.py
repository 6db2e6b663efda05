"""The output processor: joins the steps of all ranks, files their routing, makes text, ships answers."""
