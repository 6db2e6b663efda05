"""The process that encodes images with a checkpoint's vision tower, and a frontend's line to it."""
