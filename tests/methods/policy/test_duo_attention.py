from jaxtok.methods import DuoAttention

small = {"duo_attention": lambda capacity: DuoAttention(capacity=capacity, sinks=2)}
