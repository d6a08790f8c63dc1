"""Which models are looked at: those of PyTorch's own benchmark of its compilers, and torchvision's.

The first list is that of timm models in PyTorch's `benchmarks/dynamo/timm_models_list.txt`, under the names that the
models have in timm today: adv_inception_v3 has become inception_v3.tf_adv_in1k, gluon_inception_v3
inception_v3.gluon_in1k, jx_nest_base nest_base_jx, and swsl_resnext101_32x16d resnext101_32x16d.fb_swsl_ig1b_ft_in1k.
"""

from __future__ import annotations

from benchmarks.models import TORCHVISION

TIMM = """
inception_v3.tf_adv_in1k beit_base_patch16_224 botnet26t_256 cait_m36_384 coat_lite_mini convit_base convmixer_768_32
convnext_base crossvit_9_240 cspdarknet53 deit_base_distilled_patch16_224 dla102 dm_nfnet_f0 dpn107 eca_botnext26ts_256
eca_halonext26ts ese_vovnet19b_dw fbnetc_100 fbnetv3_b gernet_l ghostnet_100 inception_v3.gluon_in1k gmixer_24_224
gmlp_s16_224 hrnet_w18 inception_v3 nest_base_jx lcnet_050 levit_128 mixer_b16_224 mixnet_l mnasnet_100 mobilenetv2_100
mobilenetv3_large_100 mobilevit_s nfnet_l0 pit_b_224 pnasnet5large poolformer_m36 regnety_002 repvgg_a2
res2net101_26w_4s res2net50_14w_8s res2next50 resmlp_12_224 resnest101e rexnet_100 sebotnet33ts_256 selecsls42b
spnasnet_100 swin_base_patch4_window7_224 resnext101_32x16d.fb_swsl_ig1b_ft_in1k tf_efficientnet_b0 tf_mixnet_l
tinynet_a tnt_s_patch16_224 twins_pcpvt_base visformer_small vit_base_patch16_224 volo_d1_224 xcit_large_24_p8_224
""".split()

_CLASSIFIERS = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet1_0
mobilenet_v2 mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet50 resnext50_32x4d shufflenet_v2_x1_0 squeezenet1_1
swin_t swin_v2_t vgg11_bn vit_b_16 wide_resnet50_2
""".split()
_SEGMENTATION = "deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large".split()
_DETECTION = """
fasterrcnn_mobilenet_v3_large_320_fpn fcos_resnet50_fpn keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn
retinanet_resnet50_fpn ssd300_vgg16 ssdlite320_mobilenet_v3_large
""".split()


def names(*, every: bool = False) -> list[str]:
    """The models that are run when none are named: of torchvision's one a family, or `every` one."""
    return [*TIMM, *(TORCHVISION + name for name in (_all_of_torchvision() if every else _one_a_family()))]


def needs_graph_breaks(name: str) -> bool:
    """Whether Python code in the model depends on values in tensors, so that no single graph stands for it."""
    from torchvision.models import detection, list_models

    return name.removeprefix(TORCHVISION) in list_models(module=detection) and name.startswith(TORCHVISION)


def _one_a_family() -> list[str]:
    return [*_CLASSIFIERS, *_SEGMENTATION, *_DETECTION]


def _all_of_torchvision() -> list[str]:
    import torchvision.models

    modules = (torchvision.models, torchvision.models.segmentation, torchvision.models.detection)
    return [name for module in modules for name in torchvision.models.list_models(module=module)]
