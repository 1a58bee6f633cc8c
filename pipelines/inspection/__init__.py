"""Draws what bmojo.inspection finds: a text with the tokens that were kept, scores and attention by layer."""
