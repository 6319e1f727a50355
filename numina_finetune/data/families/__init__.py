"""How models write a conversation down: one module a chat layout, each giving the pieces of text that are tokenised."""
