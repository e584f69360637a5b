"""What pass this is: prefill or decode and which rows of a cache, which denoising step and which rows of guidance; and what is kept between passes."""
