"""What pass this is: prefill or decode, which denoising step, which rows; and what is kept from one pass to the next."""
