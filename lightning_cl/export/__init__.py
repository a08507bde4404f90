"""Files for other programs, made from folders that ``save_pretrained`` wrote."""
