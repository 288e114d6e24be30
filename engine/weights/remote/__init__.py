"""What the folder of a whole model brings along, copied as it stands: transformers loads it there, and nothing of it imports Smalt."""
