from rtp_llm.cpp.proto.model_rpc_service_pb2_grpc import (
    MultimodalRpcServiceStub,
)
from rtp_llm.cpp.proto.model_rpc_service_pb2 import (
    MultimodalInputPB,
    MultimodalInputsPB
)
from rtp_llm.utils.grpc_util import trans_tensor
import grpc
import torch
def trans_multimodal_input(urls):
    input_pb = MultimodalInputsPB()
    for url in urls:
        mm_input_pb = MultimodalInputPB()
        mm_input_pb.multimodal_url = url
        mm_input_pb.multimodal_type = 1
        mm_input_pb.mm_preprocess_config.width = -1
        mm_input_pb.mm_preprocess_config.height = -1
        mm_input_pb.mm_preprocess_config.min_pixels = -1
        mm_input_pb.mm_preprocess_config.max_pixels = -1
        mm_input_pb.mm_preprocess_config.fps = -1
        mm_input_pb.mm_preprocess_config.min_frames = -1
        mm_input_pb.mm_preprocess_config.max_frames = -1
        input_pb.multimodal_inputs.append(mm_input_pb)
    return input_pb
def main():
    with grpc.insecure_channel('localhost:12346', options=[('grpc.max_receive_message_length', 1024 * 1024 * 1024),
                                                           ('grpc.max_send_message_length', 1024 * 1024 * 1024)]) as channel:
        stub = MultimodalRpcServiceStub(channel)
        response = stub.RemoteMultimodalEmbedding(trans_multimodal_input(['/mnt/nas1/hf/llava-v1.5-7b/1.jpg']))
        for res in response.multimodal_outputs:
            print(trans_tensor(res.multimodal_embedding))
            print(trans_tensor(res.multimodal_pos_id))
if __name__ == '__main__':
    main()
