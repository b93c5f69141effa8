from jaxtok.methods import RazorAttention

small = {"razor_attention": lambda capacity: RazorAttention(capacity=capacity, sinks=1)}
