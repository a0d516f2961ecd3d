"""blipfast: BLIP pre-training, captioning, matching and retrieval; exact, fast and maintained."""

__version__ = "0.1.0"
