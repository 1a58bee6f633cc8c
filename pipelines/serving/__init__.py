"""A trained model that answers: many requests at once, over decoding states that are saved and forked."""
