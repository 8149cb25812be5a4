"""Pure maths on tensors: schemes, quantized tensors and the algorithms. Knows no model, no module and no format."""
