"""What is trained: a few small tensors beside frozen layers. The methods are peft's; which layers is ours to say."""
