"""The mathematics of TempFlow-GRPO: pure functions on tensors, each with its equation.

Letters at the end of a tensor's name are its dimensions: T denoising steps, G (prompt, seed)
groups, S branch steps, K draws at a branch step, B rows of a batch, C, H, W of a latent.

Time runs from noise to image: sigma falls from 1 to 0, step k leads from sigma_k to sigma_{k+1},
and dt_k = sigma_{k+1} - sigma_k is negative. A latent is x = (1 - sigma) image + sigma noise and
the network predicts the velocity v = noise - image.
"""
