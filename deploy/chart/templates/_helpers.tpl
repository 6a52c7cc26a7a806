{{- define "kube-lane.labels" -}}
k8s-app: kube-lane
app.kubernetes.io/name: kube-lane
app.kubernetes.io/component: proxy
app.kubernetes.io/part-of: kube-lane
{{- end -}}

{{- define "kube-lane.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- /* KubeProxyConfiguration: `config`, and over it what the chart decides. */ -}}
{{- define "kube-lane.config" -}}
{{- $own := dict "stateDir" "/var/lib/kube-lane" -}}
{{- if eq .Values.mode "ebpf" -}}
{{- $_ := set $own "cgroupRoot" "/run/kube-lane/cgroup" -}}
{{- $_ := set $own "bpfRoot" "/run/kube-lane/bpf/kube-lane" -}}
{{- $_ := set $own "socketLB" .Values.socketLB -}}
{{- end -}}
{{- $config := dict "apiVersion" "kubeproxy.config.k8s.io/v1alpha1" "kind" "KubeProxyConfiguration" "mode" .Values.mode "kubeLane" $own -}}
{{- toYaml (mergeOverwrite (deepCopy .Values.config) $config) -}}
{{- end -}}
