{{/* The parts of the agents' configuration whose change needs a restart (docs/configuration.md): the DaemonSet rolls when they change. */}}
{{- define "underpass.config.fixed" -}}
{{- $istio := dict "rootFile" "/var/run/secrets/underpass/ca/ca.crt" "tokenFile" "/var/run/secrets/underpass/token/token" "lifetime" .Values.certificates.lifetime -}}
{{- if eq .Values.issuer.kind "builtin" -}}
{{- $_ := set $istio "address" (printf "https://underpass-ca.%s.svc:15012" .Release.Namespace) -}}
{{- else -}}
{{- with .Values.issuer.external -}}
{{- $_ := set $istio "address" .address -}}
{{- $_ := set $istio "clusterId" .clusterId -}}
{{- with .serverName }}{{- $_ := set $istio "serverName" . -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if .Values.issuer.revocationLists.configMap -}}
{{- $_ := set $istio "crlFile" "/var/run/secrets/underpass/crl/crl.pem" -}}
{{- end -}}
{{- dict "trustDomain" .Values.trustDomain "issuer" (dict "istio" $istio) "kubernetes" (dict "clusterDomain" .Values.clusterDomain) | toYaml -}}
{{- end -}}

{{/* The parts that running agents take over. */}}
{{- define "underpass.config.live" -}}
{{- dict "mesh" .Values.mesh "probes" .Values.probes "accessLog" .Values.accessLog | toYaml -}}
{{- end -}}
