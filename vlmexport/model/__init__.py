"""Loading a vision-language model and the facts about it that the other rooms need."""
