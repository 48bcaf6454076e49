"""Between text and tokens: tokenizers, incremental detokenisation, chat templates."""
