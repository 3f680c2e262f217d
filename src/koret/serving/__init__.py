"""koret serve: a model behind the embeddings interface of OpenAI."""
