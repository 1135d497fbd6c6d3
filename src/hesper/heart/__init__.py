"""HEART: sensitivities of tokens and heads, the tables that price them online, and plans that keep a budget."""
