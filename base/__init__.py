"""What all packages share. A leaf: it imports none of them, and only pydantic beside the standard library."""
