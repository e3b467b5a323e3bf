"""What is there, and what it needs: answers without loading a model."""
