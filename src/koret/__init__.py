"""koret: fine-tune Korean retrieval embeddings, and prove that they got better."""
